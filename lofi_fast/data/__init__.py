"""Everything between the user's files and the encoder: annotations, videos, the frame cache, the decoding pipeline."""
