"""What several tests share, scripts of the GPU run-book among it."""
