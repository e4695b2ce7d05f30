"""GGUF files: `reader` (the container), `blocks` (the quantized types), `names` and `config` (translation to Hugging
Face's terms), `source` (all of it as a `TensorSource`). Nothing of the `gguf` package is used."""
