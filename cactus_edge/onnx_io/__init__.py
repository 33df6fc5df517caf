"""ONNX files in: float networks by post-training quantization. Needs the extra ``onnx``, not torch.

``reading`` opens the file, ``translate`` makes it the stages of ``lowering``, ``convert`` does the
rest.
"""
