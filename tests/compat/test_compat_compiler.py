"""The block under PyTorch's compilers, tracers, transforms, serialisers and counters, with kernels demanded."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from checks.block_cases import SMALL, make_block
from inception_fused import FusedInception, Inception, InceptionParams, KernelError, backend, inception
from inception_fused.block.reference import CONV_NAMES
from inception_fused.block.tensor_lists import Needs
from inception_fused.op.gradients import saves
from inception_fused.testing import Error, tolerance
from marks import full, more, quick

BOUND = tolerance(torch.float32, 10**4)

LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced rows": lambda x: torch.cat((x[:, :5], x, x[:, :3]), 1).to(memory_format=torch.channels_last)[:, 5:-3],
    "sliced pixels": lambda x: torch.cat((x, x), 3)[..., ::2],
}


def _block(seed: int = 3, **kwargs) -> FusedInception:
    torch.manual_seed(seed)
    return FusedInception(*SMALL, **kwargs)


def _eager(block: FusedInception) -> Inception:
    eager = Inception(*SMALL)
    eager.load_state_dict(block.state_dict())
    return eager


def _step(run, module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient of one step."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.square().sum().backward()
    return {"y": y.detach(), "x": leaf.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}


def _assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert Error.of(t, theirs[name]).within(BOUND), name


@full
def test_opcheck_of_slices():
    """The three operators; test_compile.py has the dense layouts."""
    block = make_block(SMALL, (2, 4, 3))
    block = block._replace(x=LAYOUTS["sliced rows"](block.x))
    needs = [True] * 13
    ops = torch.ops.inception_fused
    torch.library.opcheck(ops._infer.default, (*block, "kernels"))
    torch.library.opcheck(ops._forward.default, (*block, *saves(Needs.of(needs), True), "kernels"))
    y, *saved = block.forward()
    dy = LAYOUTS["sliced pixels"](torch.randn_like(y))
    given = (dy, block.x, *saved, block.weights, block.bias_dtypes, True, needs, "kernels")
    torch.library.opcheck(ops._backward.default, given)


@pytest.mark.parametrize(("layout", "grad"), [more("NCHW", True), more("sliced rows", True), ("NHWC", False)])
def test_opcheck_of_the_exported_operator(layout, grad):
    """The one that differentiates: its gradients must survive AOTAutograd."""
    block = make_block(SMALL, (2, 4, 3))
    leaves = [LAYOUTS[layout](block.x), *block.weights, *block.biases]
    x, *tensors = (t.detach().requires_grad_(grad) for t in leaves)
    given = (x, tensors[:6], tensors[6:], True, "kernels")
    torch.library.opcheck(torch.ops.inception_fused._exported.default, given)


@pytest.mark.parametrize(("compiler", "dynamic"), [more("aot_eager", None), more("inductor", None), ("inductor", True)])
def test_compiled_once_for_all_batches(compiler, dynamic):
    """One recompilation at most, from a fixed batch to any; gradients as eager's."""
    torch._dynamo.reset()
    block = _block()
    eager = _eager(block)
    count = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(block, fullgraph=True, backend=count, dynamic=dynamic)
    with backend("kernels"):
        for n in (2, 3, 5, 7) if dynamic is None else (2, 3):
            x = torch.randn(n, 24, 5, 4)
            _assert_alike(_step(compiled, block, x), _step(eager, eager, x))
    assert count.frame_count == (1 if dynamic else 2)


@full
def test_compiled_with_a_static_batch():
    torch._dynamo.reset()
    block = _block()
    compiled = torch.compile(block, fullgraph=True, backend="inductor", dynamic=False)
    with backend("kernels"), torch.no_grad():
        for n in (1, 4):
            x = torch.randn(n, 24, 3, 5)
            assert Error.of(compiled(x), block(x)).within(BOUND)


@pytest.fixture(scope="module")
def exported():
    """(the block, its exported program), exported as users do: in training mode, with trainable parameters."""
    block = _block()
    with backend("kernels"):
        program = torch.export.export(
            block, (torch.randn(2, 24, 5, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
        )
    return block, program


def _operators(graph: torch.fx.Graph) -> list[str]:
    return [node.target.__name__ for node in graph.nodes if "inception_fused" in str(node.target)]


def test_exported_with_a_dynamic_batch(exported):
    block, program = exported
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    with torch.no_grad():
        for given in (program, loaded):
            assert _operators(given.graph) == ["_exported.default"]
            for n in (2, 3, 7):
                x = torch.randn(n, 24, 5, 4)
                with backend("kernels"):
                    assert torch.equal(given.module()(x), block(x))


def test_exported_modules_give_gradients(exported, recwarn):
    block, program = exported
    x = torch.randn(3, 24, 5, 4)
    module = program.module()
    with backend("kernels"):
        ours, theirs = _step(module, module, x), _step(block, block, x)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    assert not [w for w in recwarn if "autograd kernel was not registered" in str(w.message)]


def test_an_exported_program_for_inference_saves_nothing(exported):
    block, program = exported
    lowered = program.run_decompositions()
    assert _operators(lowered.graph) == ["_infer.default"]
    x = torch.randn(5, 24, 5, 4)
    with backend("kernels"), torch.no_grad():
        assert torch.equal(lowered.module()(x), block(x))


@full
def test_strict_export():
    block = _block()
    x = torch.randn(2, 24, 5, 4)
    with backend("kernels"):
        module = torch.export.export(block, (x,), strict=True).module()
        _assert_alike(_step(module, module, x), _step(block, block, x))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3)
        self.blocks = nn.Sequential(_block(1), nn.Conv2d(SMALL.out_channels, 24, 1), _block(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def test_symbolic_trace():
    """One call a block, its parameters as attributes of the traced module, which trains them."""
    net = _Net()
    traced = torch.fx.symbolic_trace(net)
    calls = [node for node in traced.graph.nodes if node.target is inception]
    assert len(calls) == 2
    attributes = {node.target for node in traced.graph.nodes if node.op == "get_attr"}
    children = [f"blocks.{i}.{name}.{kind}" for i in (0, 2) for name in CONV_NAMES for kind in ("weight", "bias")]
    assert attributes == set(children)
    x = torch.randn(2, 3, 6, 5)
    with backend("kernels"):
        ours, theirs = _step(traced, traced, x), _step(net, net, x)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_features_are_extracted_by_the_nodes_name():
    net = _Net()
    traced = torch.fx.symbolic_trace(net)
    names = [node.name for node in traced.graph.nodes if node.target is inception]
    assert names == ["inception", "inception_1"]
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    output.args = ({node.name: node for node in traced.graph.nodes if node.name in names[:1]},)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    x = torch.randn(2, 3, 6, 5)
    with backend("kernels"):
        features = traced(x)
        assert features.keys() == {"inception"}
        assert torch.equal(features["inception"], net.blocks[0](net.stem(x)))
    assert not any(name.startswith("blocks.2") for name, _ in traced.named_modules())


def test_func_grad_and_per_sample_gradients():
    block = _block()
    params = {name: p.detach() for name, p in block.named_parameters()}
    x = torch.randn(3, 24, 5, 4)

    def loss(params, x):
        return torch.func.functional_call(block, params, (x,)).square().sum()

    with backend("kernels"):
        summed = torch.func.grad(loss)(params, x)
        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x.unsqueeze(1))
        theirs = _step(block, block, x)
    for name, grad in summed.items():
        assert Error.of(grad, theirs[name]).within(BOUND), name
        assert Error.of(each[name].sum(0), theirs[name]).within(BOUND), name
        assert each[name].shape == (3, *grad.shape)


def test_functional_call_takes_the_parameters_that_it_is_given():
    block, other = _block(1), _block(2)
    x = torch.randn(2, 24, 4, 3)
    with backend("kernels"), torch.no_grad():
        swapped = torch.func.functional_call(block, dict(other.named_parameters()), (x,))
        assert torch.equal(swapped, other(x))
        partly = torch.func.functional_call(block, {"p4_2.weight": other.p4_2.weight}, (x,))
        assert torch.equal(partly[:, :-8], block(x)[:, :-8])
        assert not torch.equal(partly[:, -8:], block(x)[:, -8:])


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, more(lambda m: pickle.loads(pickle.dumps(m))), _saved], ids=str)
def test_copies_are_independent(copied):
    block = _block(activation=None)
    x = torch.randn(2, 24, 4, 3)
    with backend("kernels"):
        expected = _step(block, block, x)
        other = copied(block)
        with torch.no_grad():
            for p in block.parameters():
                p.zero_()
        ours = _step(other, other, x)
    assert all(torch.equal(t, expected[name]) for name, t in ours.items())


@pytest.mark.parametrize("kind", [FusedInception, Inception])
def test_pickles_from_before_an_attribute_was_there(kind):
    """The state of a block of the first version, which knew no ``activation`` and whose modules had fewer hooks."""
    torch.manual_seed(3)
    block = kind(*SMALL)
    old = copy.deepcopy(block)
    del old.__dict__["activation"]
    for module in old.modules():
        for name in ("_backward_pre_hooks", "_non_persistent_buffers_set", "_forward_hooks_with_kwargs"):
            del module.__dict__[name]
    restored = pickle.loads(pickle.dumps(old))
    assert restored.activation == "relu"
    x = torch.randn(2, 24, 4, 3)
    with backend("kernels"):
        assert torch.equal(restored(x), block(x))


FROZEN = {"nothing": (), "x": ("x",), "the reductions": ("x", "p2_1", "p3_1"), "all but one bias": ("x", *CONV_NAMES)}


@pytest.mark.parametrize("frozen", quick(FROZEN, "nothing", "the reductions"))
def test_flops_are_eagers(frozen):
    block = _block()
    eager = _eager(block)
    x = torch.randn(3, 24, 5, 4, requires_grad="x" not in FROZEN[frozen])
    counts = []
    for module, wish in ((block, "kernels"), (eager, "auto"), (block, "auto")):
        for name in FROZEN[frozen][1:]:
            module.get_submodule(name).requires_grad_(False)
        module.p2_1.bias.requires_grad_(True)
        with backend(wish), FlopCounterMode(display=False) as counter:
            y = module(x)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
        operators = {str(op) for op in counter.get_flop_counts()["Global"]}
        assert (operators == {"inception_fused._forward", "inception_fused._backward"}) == (wish == "kernels")
    gemms = [p.numel() for name, p in block.named_parameters() if name.endswith("weight")]
    assert counts[0][0] == 2 * 3 * 5 * 4 * sum(gemms)
    assert counts[0] == counts[1] == counts[2]


def test_flops_of_inference_and_of_the_function():
    block = _block()
    with backend("kernels"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        inception(torch.randn(2, 24, 5, 4), InceptionParams(*block.params()))
    weights = sum(p.numel() for name, p in block.named_parameters() if name.endswith("weight"))
    assert counter.get_total_flops() == 2 * 2 * 5 * 4 * weights


@full
def test_onnx():
    """On a CPU the block is plain convolutions, which every ONNX runtime knows; the parameters keep their names."""
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    net = nn.Sequential(_block(), nn.Conv2d(SMALL.out_channels, 3, 1)).eval()
    program = torch.onnx.export(
        net, (torch.randn(2, 24, 5, 4),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
    )
    model = program.model_proto
    assert {node.op_type for node in model.graph.node} == {"Conv", "Relu", "MaxPool", "Concat"}
    assert {i.name for i in model.graph.initializer} == set(net.state_dict())
    runtime = ReferenceEvaluator(model)
    for n in (2, 3):
        x = torch.randn(n, 24, 5, 4)
        (y,) = runtime.run(None, {model.graph.input[0].name: x.numpy()})
        assert Error.of(torch.from_numpy(y), net(x)).within(BOUND)


def test_hooks_on_all_modules_are_still_honoured():
    """Only a ModuleTracker's are not: beside one, another's still sees the children."""
    block, seen = _block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        with FlopCounterMode(display=False), backend("kernels"), pytest.raises(KernelError, match="global module hook"):
            block(torch.randn(1, 24, 3, 3))
        with FlopCounterMode(display=False):
            block(torch.randn(1, 24, 3, 3))
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 6
