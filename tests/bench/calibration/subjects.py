"""A machine and a model that need not exist, and steps that a cost model with known constants says they take."""

from __future__ import annotations

from shoal.bench.calibration.machine import Machine, machine_of
from shoal.bench.calibration.points import Limits, StepPoint, grid, held_out
from shoal.bench.calibration.session import Subject, subject_config
from shoal.bench.calibration.step_timing import TimedStep
from shoal.core.cost.calibration import Calibration
from shoal.core.cost.model import CostModel
from shoal.core.model_shape import AttentionShape, LayerShape, MLPShape, ModelShape
from shoal.engine.device_timing import DeviceFigures

FIGURES = DeviceFigures(
    name="Example(R) CPU @ 2.30GHz",
    memory_bytes=24 << 30,
    read_bandwidth=30e9,
    copy_bandwidth=20e9,
    rates={"float32": 330e9},
    kernel_seconds=3e-6,
    kernels="native",
    all_reduce={2: ((256, 2e-6), (4096, 3e-6), (65536, 1e-5), (1 << 20, 1.2e-4))},
)
SHAPE = ModelShape(
    name="small",
    hidden_size=576,
    vocab_size=49152,
    max_len=8192,
    tied_embeddings=True,
    layers=(
        LayerShape(
            count=30,
            attention=AttentionShape(kind="full", num_heads=9, num_kv_heads=3, head_dim=64, parameters=884_736),
            mlp=MLPShape(intermediate_size=1536),
            norms=1152,
        ),
    ),
)
LIMITS = Limits(max_len=2200, max_sequences=40, max_batch_tokens=512, cache_tokens=24_000)


def machine() -> Machine:
    return machine_of(FIGURES, 2, "2026-11-21", is_cpu=True)


def subject() -> Subject:
    config = subject_config("small", "float32", "cpu", SHAPE)
    return Subject(shape=SHAPE, config=config, machine=machine(), cores=2, vocab_size=49152, ranks=(1, 2))


def timed(tp: int, point: StepPoint, seconds: float, foreign_cores: float = 0.0) -> TimedStep:
    return TimedStep(
        tp=tp,
        point=point,
        seconds=seconds,
        low=seconds,
        high=seconds,
        visits=3,
        disturbed=3 * int(foreign_cores > 0.15),
        foreign_cores=foreign_cores,
    )


def steps_of(truth: Calibration, ranks: tuple[int, ...] = (1, 2), unseen: int = 0) -> list[TimedStep]:
    """As they would be measured if `truth` were so: of the grid, or of so many points beside it."""
    steps = []
    for tp in ranks:
        model = CostModel(subject().engine_shape(tp), truth)
        points = held_out(LIMITS, unseen, tp, grid(LIMITS)) if unseen else grid(LIMITS)
        steps += [timed(tp, point, model.seconds(point.shape())) for point in points]
    return steps
