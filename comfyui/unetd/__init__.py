"""ComfyUI on a remote UNet: a client of the unetd server, and the nodes that use it."""
