"""MEGAN (arXiv 1805.02481) as a system: n generators, a gate that chooses among them, WGAN-GP.

The generators lie along the mesh's expert axis: each device runs its own generators on all latents of its `data` block, and
the gated images are then spread over all devices. The gate is a network of its own, since its optimizer differs.

  B batch, n generators, Z latent width
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax.ops import random_keys
from aurora_jax.parallel.mesh import KeyPath, ParamLabel, names_of
from aurora_jax.systems import base
from aurora_jax.systems.megan import annealing, losses
from aurora_jax.systems.megan.discriminator import Discriminator
from aurora_jax.systems.megan.generator import Generator, GeneratorOutput, join_gate, split_gate

_STATISTICS = "batch_stats"


def label(path: KeyPath) -> ParamLabel:
  """The label of a parameter, or of a batch norm's statistic; all arrays under "generators" are stacked by generator."""
  names = names_of(path)
  module = next((name for name in names[:-1] if name != "generators"), names[0])
  return ParamLabel(experts=names[0] == "generators", bias=names[-1] == "bias", module=module, group=module)


class Draws(NamedTuple):
  """The random numbers of one pass.

  Attributes:
    z: [B, Z] from N(0, 1), the latents.
    uniform: [B, n] from U[0, 1), for the gate's noise.
    alpha: [B] from U[0, 1): where between real and generated images the gradient penalty is taken.
  """

  z: jax.Array
  uniform: jax.Array
  alpha: jax.Array


class System(base.System):
  """See `base.System`."""

  truncates = False
  sampled = ("generator", "gate")
  headline = ("loss/d_wasserstein", "loss/g_wasserstein", "loss/gp")

  def __init__(self, experiment, layout=None):
    super().__init__(experiment, layout)
    self.generator = Generator(experiment.generator, self._place_stacked if self.layout.devices > 1 else None)
    self.discriminator = Discriminator(experiment.discriminator)
    optimizer = experiment.optimizer
    self.networks = {
      "generator": base.Network("g", optimizer.generator, label),
      "gate": base.Network("gate", optimizer.gate, label),
      "discriminator": base.Network("d", optimizer.discriminator, label),
    }

  @property
  def log_names(self):
    more = {"gp": "gradient penalty of the discriminator", "balance": "balance of the gate"}
    return {**super().log_names, **more}

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key):
    cfg = self.experiment.generator
    shapes = jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, cfg.generators)), 1.0
    generator, gate = split_gate(Generator(cfg).init(random_keys.fold(key, "generator"), *shapes))
    image = jnp.zeros((1, cfg.resolution, cfg.resolution, 3))
    discriminator = self.discriminator.init(random_keys.fold(key, "discriminator"), image)
    return {"generator": generator, "gate": gate, "discriminator": discriminator}

  def batch_spec(self, batch_size):
    side = self.experiment.resolution
    return {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}

  def phases(self, update):
    """Discriminator rounds, generators and gate, and, if `loss.load_balance`, the gate toward equal use."""
    loss = self.experiment.loss

    def train_discriminator(state, frozen, batch, key):
      """One round: the Wasserstein loss, then the penalty at the weights that it left, with the same moments."""
      del frozen
      real = batch["image"]
      draws = self._draws(key)
      out, statistics = self._generate(state, state.networks["generator"].params, state.networks["gate"].params, draws)
      fake = jax.lax.stop_gradient(out.image)
      between = losses.interpolate(real, fake, draws.alpha)

      def wasserstein(params):
        real_score, fake_score = self._score(params, real), self._score(params, fake)
        value = losses.discriminator_wasserstein(real_score, fake_score)
        metrics = {"loss/d_wasserstein": value, "d/score_real": real_score.mean(), "d/score_fake": fake_score.mean()}
        return value, metrics

      def penalty(params):
        with jax.named_scope("gradient_penalty"):
          value = losses.gradient_penalty(lambda images: self._score(params, images), between)
        return loss.gradient_penalty_weight * value, {"loss/gp": value}

      def both(params):
        (first, metrics), (second, more) = wasserstein(params), penalty(params)
        return first + second, metrics | more

      of_d = lambda function, state: jax.grad(function, has_aux=True)(state.networks["discriminator"].params)
      bad = base.bad_images(real, fake)
      if not loss.gp_separate_step:
        gradients, metrics = of_d(both, state)
        state, healthy, metrics = update(state, "discriminator", gradients, metrics | bad)
        return self._with_statistics(state, statistics, healthy), metrics
      gradients, metrics = of_d(wasserstein, state)
      state, healthy, metrics = update(state, "discriminator", gradients, metrics | bad)
      gradients, more = of_d(penalty, state)
      state, healthy, more = update(state, "discriminator", gradients, more, healthy=healthy, log_name="gp")
      return self._with_statistics(state, statistics, healthy), metrics | more

    def train_generator(state, frozen, batch, key):
      """Generators and gate on the discriminator's score of the gated images."""
      del frozen, batch

      def score(params):
        out, statistics = self._generate(state, params["generator"], params["gate"], self._draws(key))
        value = losses.generator_wasserstein(self._score(state.networks["discriminator"].params, out.image))
        metrics = {"loss/g_wasserstein": value, "moe/load/generators": losses.load(jax.lax.stop_gradient(out.gate))}
        return value, (metrics, statistics)

      params = {name: state.networks[name].params for name in self.sampled}
      gradients, (metrics, statistics) = jax.grad(score, has_aux=True)(params)
      metrics["gate/temperature"] = annealing.temperature(loss, state.step)
      state, healthy, metrics = update(
        state, "generator", gradients["generator"], metrics, variables=statistics["generator"]
      )
      state, _, more = update(state, "gate", gradients["gate"], {}, healthy=healthy, variables=statistics["gate"])
      return state, metrics | more

    def balance(state, frozen, batch, key):
      """The gate toward equal use of the generators."""
      del frozen, batch

      def unequal(gate):
        out, statistics = self._generate(state, state.networks["generator"].params, gate, self._draws(key))
        value = losses.balance(out.gate)
        return annealing.balance_weight(loss, state.step) * value, ({"loss/balance": value}, statistics)

      gradients, (metrics, statistics) = jax.grad(unequal, has_aux=True)(state.networks["gate"].params)
      state, healthy, metrics = update(
        state, "gate", gradients, metrics, variables=statistics["gate"], log_name="balance"
      )
      return self._with_statistics(state, {"generator": statistics["generator"]}, healthy), metrics

    phases = [
      base.Phase("discriminator", train_discriminator, repeats=loss.d_steps),
      base.Phase("generator", train_generator),
    ]
    return [*phases, base.Phase("balance", balance)] if loss.load_balance else phases

  def _draws(self, key) -> Draws:
    cfg, batch = self.experiment.generator, self.experiment.train.batch_size
    return Draws(
      jax.random.normal(random_keys.fold(key, "latents"), (batch, cfg.z_dim)),
      jax.random.uniform(random_keys.fold(key, "gate"), (batch, cfg.generators)),
      jax.random.uniform(random_keys.fold(key, "interpolate"), (batch,)),
    )

  def _generate(self, state, generator_params, gate_params, draws) -> tuple[GeneratorOutput, dict[str, Any]]:
    """A forward pass in training mode: (output, new batch norm statistics {network: {collection: tree}})."""
    params = {"generator": self.gather("generator", generator_params), "gate": self.gather("gate", gate_params)}
    variables = join_gate(*({"params": params[name], **state.networks[name].variables} for name in self.sampled))
    z, uniform = self._place_latents((draws.z, draws.uniform))
    temperature = annealing.temperature(self.experiment.loss, state.step)
    with jax.named_scope("generators"):
      out, moved = self.generator.apply(variables, z, uniform, temperature, train=True, mutable=[_STATISTICS])
    generator, gate = split_gate(moved)
    return self._place_images(out), {"generator": generator, "gate": gate}

  def _score(self, params, images):
    with jax.named_scope("discriminator"):
      return self.discriminator.apply({"params": self.gather("discriminator", params)}, images)

  def _with_statistics(self, state, statistics, healthy):
    """The state with batch norm statistics that a discriminator or balance pass moved, if that was finite."""
    for name, variables in statistics.items():
      network = state.networks[name]
      keep = lambda new, old: jnp.where(healthy, new, old)
      state = state.with_network(name, network.replace(variables=jax.tree.map(keep, variables, network.variables)))
    return state

  # ---- on a mesh ---------------------------------------------------------------------------------------------------
  #
  # Nothing but the real images tells XLA how a batch lies, and the phases of generator and gate read none: without these
  # constraints every device would work on the whole batch.

  def _place_latents(self, rows):
    """Arrays [B, ...]: the same latents on all devices that share the generators among them."""
    return self._constrain(rows, self._latent_axes)

  def _place_stacked(self, maps):
    """Feature maps of all generators [n, B, ...]: generators along their mesh axes, samples along the others."""
    return self._constrain(maps, self._generator_axes, self._latent_axes)

  def _place_images(self, out):
    """The gated images [B, ...] along all axes, for the discriminator."""
    return out.replace(image=self._constrain(out.image, self.layout.rules.batch))

  @property
  def _generator_axes(self):
    return self.layout.expert_axes(self.experiment.generator.generators)

  @property
  def _latent_axes(self):
    return tuple(axis for axis in self.layout.rules.batch if axis not in self._generator_axes)

  def _constrain(self, tree, *axes):
    if self.layout.devices == 1:
      return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(self.layout.mesh, PartitionSpec(*axes)))

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def draw_latents(self, key):
    cfg = self.experiment.generator
    z, uniform = random_keys.fold(key, "z"), random_keys.fold(key, "uniform")
    return {"z": jax.random.normal(z, (cfg.z_dim,)), "uniform": jax.random.uniform(uniform, (cfg.generators,))}

  def sample(self, networks, frozen, condition, latents, psi=1.0):
    del frozen, condition, psi
    variables = join_gate(networks["generator"], networks["gate"])
    z, uniform = self._place_latents((latents["z"], latents["uniform"]))
    # A hard gate takes the same generator at any temperature.
    out = self._place_images(self.generator.apply(variables, z, uniform, 1.0, method="sample"))
    return base.Sample(out.image, {"generator": jnp.argmax(out.gate, axis=-1).astype(jnp.int32)})

  def choice_count(self, name):
    del name
    return self.experiment.generator.generators

  @property
  def sampling_batch_size(self):
    return int(np.clip(2**24 // (self.experiment.generator.generators * self.experiment.resolution**2 * 64), 2, 64))
