"""Which samples and which answer tokens to train on."""
