"""pairs: log-sum-exps of scaled similarities of pairs, which need never lie in memory whole."""
