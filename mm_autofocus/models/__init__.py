"""Learned focus: model cards, and models at run time (ONNX Runtime only).

The nets themselves are in `mm_autofocus.models.nets` and need torch; nothing else here does.
"""
