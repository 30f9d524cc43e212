"""TSM-ResNet video encoders."""
