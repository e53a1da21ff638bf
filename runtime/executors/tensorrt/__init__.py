"""The TensorRT executor: networks, engine files, and the session that runs them."""
