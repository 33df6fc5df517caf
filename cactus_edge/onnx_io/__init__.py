"""ONNX files in and out. Needs the extra ``onnx``, not torch.

In: ``reading`` opens a float network, ``translate`` makes it the stages of ``lowering``, and
``convert`` quantizes it. Out: ``qdq`` writes a model's integers, ``real_form`` its dequantized
network, ``export`` compares and adds a query.
"""
