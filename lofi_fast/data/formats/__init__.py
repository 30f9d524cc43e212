"""The formats that labels come in: a file each, which recognises its own by content and reads it; some write it too."""
