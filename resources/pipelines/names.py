"""The names of the input and the output that every public model has."""

#: The input that takes token ids in place of texts, and the output that holds the number of tokens that were read.
TOKEN_IDS, TOKEN_COUNT = "INPUT_IDS", "TOKENS"
