"""What the kernels' engine asks of the device: launches, graphs, compilations, streams."""
