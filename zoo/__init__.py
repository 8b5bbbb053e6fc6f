"""A zoo of deep equilibrium models.

>>> zoo.list_models("tanh*")
>>> model = zoo.create_model("tanh_deq", num_classes=10)
>>> model = zoo.load_pretrained("tanh_deq.digits")
"""

from . import implicit, tanh
from .registry import ModelSpec, create_model, list_models, register_model, spec_of
from .tanh import TanhCell, TanhDEQ
