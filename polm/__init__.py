"""polm takes a base language model through all of post-training and turns the result into a better base."""

__version__ = "0.1.0"
