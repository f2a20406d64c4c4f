"""A trained model outside of sentence-transformers: as one ONNX graph, and in servers.

It imports nothing, so that a server's environment can import a file of it without the rest of this package's
dependencies.
"""
