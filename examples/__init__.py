"""neglog at work: numpy_only.py and train_gpt.py to read and run, demo for `neglog demo`."""
