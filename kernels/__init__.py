"""The physics and the models: plain functions, arrays in, arrays out."""
