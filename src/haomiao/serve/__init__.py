"""HTTP: a server process that parses and renders, an engine process that computes, and the messages between them."""
