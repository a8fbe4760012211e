"""What a model is: its convolutions, strides, rates and fields of view, in numbers and pictures."""
