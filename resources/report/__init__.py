"""The report of one optimization: a page and its pictures, for people who were not there."""
