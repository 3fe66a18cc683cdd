"""The report of one optimization: a page and its pictures, for people who did not follow the run."""
