"""Ready-made backbones and classifiers of images."""
