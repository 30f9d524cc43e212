"""The stages of a training, each a file of its own: pretrain, joint, features, head, evaluation."""
