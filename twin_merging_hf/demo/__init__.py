"""A small end-to-end demonstration on scikit-learn's handwritten digits."""
