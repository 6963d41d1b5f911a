"""How good and how large a quantized model is: FD and PSNR, bytes, and the pictures and tables that show them."""
