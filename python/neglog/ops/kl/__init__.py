"""kl: how far a student's distributions are from a teacher's, with a cross-entropy beside it."""
