"""What a text tells about the inputs of a model's products, and quantisation that uses it."""
