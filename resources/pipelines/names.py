"""The names of inputs and outputs that every public model has."""

#: The input that takes token ids in place of texts, and the output that says how many tokens were read.
TOKEN_IDS, TOKEN_COUNT = "INPUT_IDS", "TOKENS"
