"""Aurora's generator under its former name; see systems/aurora/generator.py."""

from aurora_jax.systems.aurora.generator import Generator, GeneratorOutput, Routing, abstract_variables

__all__ = ["Generator", "GeneratorOutput", "Routing", "abstract_variables"]
