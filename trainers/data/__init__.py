"""Text in, batches out: corpora, tokenizers, packed token files, splits and loaders."""
