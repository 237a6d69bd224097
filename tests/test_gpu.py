"""The engine on a GPU: its accuracy through the decode graph, its graphs, and the order that early launches must keep."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from decoding import decode_one_token
from generate import Engine, Transformer, fill_randomly
from kernels.flash_prefill import CUDNN_TOKENS, cudnn_runs
from kv_cache import KVCache
from model import SHAPES, PackStep, PrefillStep
from prefill import Piece, Prefiller
from quantize import make_recipe
from runs import CHUNK, Request
from sampling import SamplingParams
from speculative import ModelDrafter, NgramDrafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).parent.parent


def small(num_layers=3, **options):
    """The true shape of the 1B model, of few layers where only the paths matter: torch.compile takes long over sixteen."""
    model = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], num_layers=num_layers), device="cuda")
    fill_randomly(model)
    return Engine(model, max_seq_len=512, **options)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 100_000, (160,), generator=torch.Generator().manual_seed(0)).cuda()


def teacher_forced_logits(engine, tokens, prompt_len):
    """Logits [len(tokens) - prompt_len, V]: a prefill, then one-step graphs that are fed the given tokens."""
    engine.prepare(1, len(tokens) + 8)
    session, model = engine.session, engine.model
    model(model.embed(tokens[:prompt_len]), PackStep.of(session.cache, [(0, prompt_len, 0)]))
    session.limit.fill_(session.max_seq_len)
    session.done.zero_()
    got = []
    for i in range(prompt_len, len(tokens)):
        session.x.copy_(model.embed(tokens[i : i + 1]))
        session.cache.lengths.fill_(i + 1)
        engine.decoder.run(1)
        got.append(engine.decoder.logits.clone())
    return torch.cat(got)


def hf_logits(model, tokens, dtype):
    """The same weights through transformers in `dtype`."""
    import transformers

    c = model.config
    config = transformers.AutoConfig.for_model(**c.to_dict())
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    state = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.head.weight
    for i, layer in enumerate(model.layers):
        p, a, f = f"model.layers.{i}.", layer.attention, layer.feed_forward
        q, k, v = a.wqkv.weight.split([c.q_size, c.kv_size, c.kv_size])
        gate, up = f.w13.weight.chunk(2)
        state |= {
            p + "self_attn.q_proj.weight": q, p + "self_attn.k_proj.weight": k, p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": a.wo.weight, p + "mlp.gate_proj.weight": gate, p + "mlp.up_proj.weight": up,
            p + "mlp.down_proj.weight": f.w2.weight, p + "input_layernorm.weight": layer.attention_norm.weight,
            p + "post_attention_layernorm.weight": layer.ffn_norm.weight,
        }  # fmt: skip
    state = {name: t.to(dtype) for name, t in state.items()}
    reference.load_state_dict(state, strict=True, assign=True)
    with torch.device("cuda"):  # its RoPE buffers are not in the state dict
        reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    with torch.no_grad():
        return reference.cuda().eval()(tokens[None]).logits[0].float()


def test_accuracy_of_the_decode_graph(tokens):
    """128 teacher-forced steps of a true-size 1B in bf16: at every position the RMS error against float32 is at most 1.1
    times that of transformers in bf16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = small(num_layers=16, decode_mode="graph")
    got = teacher_forced_logits(engine, tokens, 32)
    exact = hf_logits(engine.model, tokens, torch.float32)[32:]
    theirs = hf_logits(engine.model, tokens, torch.bfloat16)[32:]
    ours_rms, theirs_rms = ((x - exact).pow(2).mean(1).sqrt() for x in (got, theirs))
    ratio = (ours_rms / theirs_rms).max().item()
    print(f"RMS logit error: ours {ours_rms.mean():.5f}, transformers {theirs_rms.mean():.5f}, worst ratio {ratio:.3f}")
    assert len(got) == 128
    assert ratio <= 1.1


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-8b"])
def test_kernels_agree_with_plain_pytorch(shape, tokens):
    """Decode steps through the kernels against one full forward in plain PyTorch, a few layers of the true shape."""
    config = dataclasses.replace(SHAPES[shape], num_layers=3)
    model = Transformer(config, device="cuda")
    fill_randomly(model)
    engine = Engine(model, decode_mode="graph", max_seq_len=512)
    got = teacher_forced_logits(engine, tokens, 100)
    expected = model.logits(model(model.embed(tokens), PrefillStep(len(tokens))))[100:]
    exact = Transformer(config, device="cuda", dtype=torch.float32)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    exact.setup_rope(512)
    exact = exact.logits(exact(exact.embed(tokens), PrefillStep(len(tokens))))[100:]
    ours, plain = ((x - exact).norm() / exact.norm() for x in (got, expected))
    print(f"{shape}: relative error of the kernels {ours:.5f}, of plain PyTorch {plain:.5f}")
    assert ours <= 1.1 * plain


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.2, "logprobs": 2},
    ],
    ids=str,
)
def test_every_path_gives_the_same_tokens(params, tokens):
    """Graphs, reduce-overhead and eager steps run the same kernels: greedy and seeded tokens are equal."""
    params = SamplingParams(max_new_tokens=40, **params)
    got = {}
    for mode in ("eager", "graph", "reduce-overhead"):
        torch._dynamo.utils.counters.clear()
        engine = small(decode_mode=mode)
        for _ in range(2):  # Inductor records its CUDA graph in the second run
            # 64 rows: a pack that a graph does not pad, so that its products are those of the eager one
            outputs, _ = engine.generate([tokens[:14].tolist(), tokens[:50].tolist()], params)
        got[mode] = [o.tokens for o in outputs]
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert got["graph"] == got["eager"]
    assert got["reduce-overhead"] == got["eager"]


def mixed_requests(number):
    """Greedy and drawn, of 1 to 60 tokens in and out."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 61, (number, 2), generator=generator).tolist()
    ids = lambda n: torch.randint(0, 100_000, (n,), generator=generator).tolist()
    draws = {"temperature": 1e-4, "top_k": 5}  # as good as greedy, by another path
    params = lambda i, n: SamplingParams(max_new_tokens=n, ignore_eos=True, **draws if i % 3 == 2 else {})
    return [Request(ids(n), params(i, out), id=i) for i, (n, out) in enumerate(lengths)]


def test_continuous_batching_in_graphs(monkeypatch):
    """Rows that change hands and move, graphs of several buckets: every token is, in a plain forward of its own prompt and
    answer, at most a rounding below the best."""
    monkeypatch.setattr("runs.STEPS_WORTH_CAPTURE", 0)
    engine = small(decode_mode="graph")
    got = {request.id: (request, outputs[0]) for request, outputs in engine.generate_many(mixed_requests(40), 12)}
    assert sorted(got) == list(range(40))
    assert {rows for _, rows, *_ in engine.decoder.graphs} >= {12, 8, 4}
    exact = Transformer(engine.model.config, device="cuda", dtype=torch.float32)
    exact.load_state_dict({name: t.float() for name, t in engine.model.state_dict().items()})
    exact.setup_rope(512)
    for request, out in got.values():
        assert len(out.tokens) == request.params.max_new_tokens
        ids = torch.tensor([*request.prompt, *out.tokens], device="cuda")
        logits, plain = (
            m.logits(m(m.embed(ids), PrefillStep(len(ids))))[len(request.prompt) - 1 : -1] for m in (exact, engine.model)
        )
        rounding = (plain - logits).abs().max()
        chosen = logits.gather(1, ids[len(request.prompt) :, None])[:, 0]
        assert (logits.max(dim=1).values - chosen <= 2 * rounding).all(), request.id
        assert rounding < logits.std() / 4, "else any token would do"


def test_the_host_waits_for_nothing_but_the_status():
    """No operation of a run of many prompts makes the host wait for the device, once all graphs are there."""
    engine = small(decode_mode="graph")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            assert len(list(engine.generate_many(mixed_requests(40), 12))) == 40
        finally:
            torch.cuda.set_sync_debug_mode("default")


PACKED_STEPS = [
    ("llama-3.2-1b", "fp8", 9), ("llama-3.1-8b", "fp8", 5), ("qwen3-8b", "int4", 16), ("qwen2.5-7b", "int8", 40),
    ("heads of 80", "fp8", 16),
]  # fmt: skip


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize(("shape", "mode", "rows"), PACKED_STEPS)
def test_packed_rings_in_a_step(shape, mode, rows, cache, monkeypatch):
    """A step through rings, with columns permuted from kernel to kernel, and one through other tiles: the same logits but for
    rounding; graph and eager alike, bit for bit. And a prompt of as many tokens."""
    other = {"hidden_size": 2560, "intermediate_size": 6912, "num_heads": 32, "num_kv_heads": 8, "head_dim": 80}
    config = SHAPES[shape] if shape in SHAPES else dataclasses.replace(SHAPES["mistral-7b"], **other)  # no kernel's head size
    config = dataclasses.replace(make_recipe(mode, config).config(config), num_layers=3)
    model = Transformer(config, device="cuda")
    fill_randomly(model)
    engine = Engine(model, decode_mode="graph", max_seq_len=512, kv_cache_dtype=cache)
    engine.prepare(rows, 512)
    session = engine.session
    x = model.embed(torch.arange(rows, device="cuda") + 7)

    def start():
        session.x.copy_(x)
        session.cache.lengths.fill_(1)
        session.limit.fill_(500)
        session.done.zero_()

    def prefill():
        cache = KVCache(model.config, 1, 512, x.device, x.dtype)
        return Prefiller(model, cache).run([Piece(0, list(range(rows)))])

    module, launched = sys.modules["kernels.linear"], []  # by its path it would be the function
    for name in ("launch_packed_ring", "launch_packed_ring_qkv"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (launched.append(real), real(*a, **k)))
    start()
    rings = decode_one_token(model, session, "greedy").clone()
    all_linears = 12 if rows > 8 else 11  # of few rows not the first layer's qkv
    assert len(launched) == (6 if config.head_dim == 80 else all_linears), "of odd heads the feed-forwards"
    start()
    engine.decoder.run(1)
    assert torch.equal(engine.decoder.logits, rings)
    rings_hidden = prefill()
    assert kernels.reads_permuted("head", x, model.head)
    monkeypatch.setattr("kernels._matmul.has_wgmma", lambda x: False)
    launched.clear()
    start()
    tiles = decode_one_token(model, session, "greedy")
    hidden = prefill()
    assert not launched
    for got, expected in ((rings, tiles), (rings_hidden, hidden)):
        assert (got - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"])
def test_activations_in_fp8(shape):
    """A prefill, by a graph and step by step, of 3 tokens, 370, 1,900 and 3,000: near to that of x in bf16. e4m3
    errs by 2.6% RMS, and eight products follow each other: 7.4% of one like the others, of which twice is allowed."""
    config = dataclasses.replace(make_recipe("fp8", SHAPES[shape]).config(SHAPES[shape]), num_layers=2)
    model = Transformer(config, device="cuda")
    fill_randomly(model)
    tokens = torch.randint(0, 1000, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    hidden = {}
    for name in ("auto", "fp8"):
        for mode in ("eager", "graph"):
            engine = Engine(model, activation_dtype=name, decode_mode=mode, max_seq_len=4096)
            engine.prepare(3, 4096)
            for pieces in (
                [Piece(0, tokens[:300]), Piece(1, tokens[:70])],
                [Piece(2, tokens)],
                [Piece(0, tokens[:3])],
                [Piece(1, tokens[:1900])],
            ):
                hidden[name, mode, sum(len(p.tokens) for p in pieces)] = engine.prefiller.run(pieces).float()
    for count in (3, 370, 1900, 3000):
        plain, rounded, graph = (hidden[(*key, count)] for key in (("auto", "eager"), ("fp8", "eager"), ("fp8", "graph")))
        assert 1e-3 * plain.norm() < (rounded - plain).norm() < 0.15 * plain.norm()
        assert (graph - rounded).norm() < 0.02 * rounded.norm()


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"])
def test_packed_prefill(shape):
    """Ragged packs, whole and in two parts, step by step and through graphs, against prompts alone: hidden states and cache."""
    window = {"sliding_window": 100, "sliding_layers": (True, False, False)} if shape == "mistral-7b" else {}
    config = dataclasses.replace(SHAPES[shape], num_layers=3 if window else 2, **window)
    model = Transformer(config, device="cuda")
    fill_randomly(model)
    model.setup_rope(2048)
    counts = [300, 1, 17, 64, 700, 5, 1910, 2048]  # the last one by cuDNN, the one before padded in a graph
    prompts = [torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in counts]
    exact = Transformer(config, device="cuda", dtype=torch.float32)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    exact.setup_rope(2048)
    alone, truth = (
        torch.cat([m(m.embed(torch.tensor(p).cuda()), PrefillStep(len(p)))[-1:] for p in prompts]) for m in (model, exact)
    )
    allowed = 1.1 * (alone - truth).norm()
    caches = {}
    choices = (slice(0, 6), slice(1, 4), slice(2, 3), slice(7, 8), slice(6, 7))
    for graphs in (False, True):
        for chosen in choices:
            cache = KVCache(config, 8, 2048, "cuda")
            for buffer in cache.buffers():
                if buffer.is_floating_point():
                    buffer.fill_(torch.nan)
            prefiller = Prefiller(model, cache, graphs=graphs)
            assert prefiller.flash
            if graphs:
                prefiller.x.fill_(torch.nan)  # what is behind the prompts may be anything
            pieces = [Piece(7 - slot, ids) for slot, ids in list(enumerate(prompts))[chosen]]
            for parts in ([0 for _ in pieces], [len(p.tokens) // 2 for p in pieces]):
                prefiller.run([Piece(p.slot, p.tokens[:n]) for p, n in zip(pieces, parts, strict=True) if n] or pieces)
                rest = [Piece(p.slot, p.tokens[n:], n) for p, n in zip(pieces, parts, strict=True)]
                for _ in range(2):  # a graph's second replay finds its buffers used
                    error = (prefiller.run(rest) - truth[chosen]).norm()
                    assert error <= allowed * 1.5, (graphs, chosen, parts)
            caches[graphs, chosen.start] = [cache.k0.clone(), cache.v1.clone()]
            written = torch.zeros(8, 2048, dtype=torch.bool, device="cuda")
            for p in pieces:
                written[p.slot, : len(p.tokens)] = True
            assert (cache.k0.isnan().any(3).any(1) == ~written).all(), "padding is appended nowhere"
    if cudnn_runs(model.norm.weight.device, torch.bfloat16, config.num_heads, config.num_kv_heads, config.head_dim):
        assert "cudnn" in kernels.attention_launched
    for chosen in choices:
        for a, b in zip(caches[False, chosen.start], caches[True, chosen.start], strict=True):
            assert (a.nan_to_num() - b.nan_to_num()).norm() <= 0.02 * b.nan_to_num().norm()


def test_attention_of_long_prompts():
    """What runs where prompts are alike and long (cuDNN, if it takes them) against what runs otherwise."""
    count, n, Hq, Hkv, D = 2, CUDNN_TOKENS, 32, 8, 128
    q, k, v = (torch.randn(count * n, h, D, device="cuda", dtype=torch.bfloat16) for h in (Hq, Hkv, Hkv))
    first = torch.arange(count + 1, dtype=torch.int32, device="cuda") * n
    lengths = first.diff()
    dense = kernels.flash_prefill(q, k, v, first, first, longest=n, scale=0.1)
    packed = kernels.flash_prefill(q, k, v, first, first, lengths, longest=n, scale=0.1)
    print("cuDNN for long prompts:", cudnn_runs(q.device, q.dtype, Hq, Hkv, D))
    assert (dense - packed).norm() <= 0.01 * packed.norm()


def test_time_to_first_token():
    """Short prompts through graphs: printed, and the capture is not in it but is reported."""
    engine = small(num_layers=16, decode_mode="graph")
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    for count, length in ((1, 32), (1, 128), (16, 32)):
        prompts = [list(range(length))] * count
        _, first = engine.generate(prompts, params)
        times = [engine.generate(prompts, params)[1] for _ in range(5)]
        median = sorted(t.ttft_sec for t in times)[2]
        print(f"TTFT of {count} x {length} tokens: {median * 1e3:.2f} ms, captured in {first.compile_sec:.2f} s")
        assert first.compile_sec > 0
        assert all(t.compile_sec == 0 for t in times)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9}], ids=str
)
def test_many_rows_decode_as_few_do(params, tokens):
    """Steps of 100 sequences (cuBLAS and the kernels between the products) against steps of each ten of them."""
    params = SamplingParams(max_new_tokens=2, ignore_eos=True, **params)
    prompts = [tokens[i : i + 20 + i % 7].tolist() for i in range(100)]
    engine = small(decode_mode="graph")
    together = [o.tokens for o in engine.generate(prompts, params)[0]]
    engine = small(decode_mode="graph")
    few = [o.tokens for i in range(0, 100, 10) for o in engine.generate(prompts[i : i + 10], params)[0]]
    same = sum(a == b for x, y in zip(together, few, strict=True) for a, b in zip(x, y, strict=True))
    print(f"{same} of 200 tokens are the same")  # bf16 in another order parts some
    assert same >= 165


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 0.9, "top_k": 50}], ids=str)
def test_speculation_in_graphs(params, tokens):
    """Captured rounds give what eager ones give; nearly all drafts of a twin stand, its cache catches up after plain steps, and
    each greedy token is a rounding from plain PyTorch's best."""
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, **params)
    # 64 rows: a pack that a graph does not pad, so that its products are those of the eager one
    prompts, got = [tokens[:14].tolist(), tokens[:50].tolist()], {}
    for mode in ("eager", "graph"):
        engine = small(decode_mode=mode)
        engine.speculate(ModelDrafter(engine.model), 3, adaptive=False)
        outputs, timing = engine.generate(prompts, params)
        got[mode] = [o.tokens for o in outputs]
        assert timing.speculation["acceptance_rate"] > 0.5, timing.speculation
    assert got["graph"] == got["eager"]

    engine.speculate(ModelDrafter(engine.model), 3, adaptive=True)
    engine.prepare(2, 110)
    engine.speculator.acceptance.kept = 0.0  # off, until it is seen to be right
    outputs, timing = engine.generate(prompts, params)
    assert timing.speculation["launches_by_k"][0] > 0
    assert timing.speculation["acceptance_rate"] > 0.5, timing.speculation
    if params.temperature == 0:
        for prompt, out in zip(prompts, outputs, strict=True):
            ids = torch.tensor(prompt + out.tokens, device="cuda")
            logits = engine.model.logits(engine.model(engine.model.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 : -1]
            behind = logits.max(dim=1).values - logits.gather(1, ids[len(prompt) :, None])[:, 0]
            assert behind.max() < 0.1 * logits.std()


def test_n_gram_speculation_in_graphs(tokens):
    engine = small(decode_mode="graph")
    engine.speculate(NgramDrafter(), 5, adaptive=False)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompt = tokens[:10].tolist() * 4
    graph, _ = engine.generate([prompt], params)
    eager = small(decode_mode="eager")
    eager.speculate(NgramDrafter(), 5, adaptive=False)
    assert graph[0].tokens == eager.generate([prompt], params)[0][0].tokens


ORDER = """
import hashlib, sys, torch
sys.path.insert(0, {root!r})
import kernels
from generate import Engine, STEPS_PER_GRAPH, fill_randomly
from model import SHAPES, Transformer
import dataclasses
from quantize import make_recipe
config = SHAPES[{shape!r}]
config = dataclasses.replace(make_recipe({mode!r}, config).config(config) if {mode!r} else config, num_layers=2)
model = Transformer(config, device="cuda"); fill_randomly(model)
engine = Engine(model, decode_mode="graph", max_seq_len=1024)
engine.prepare({batch}, 1024)
s = engine.session
def digest():
    return hashlib.sha256(b"".join(b.view(torch.uint8).cpu().numpy().tobytes() for b in s.buffers() if b.numel())).hexdigest()
def run():
    for b in s.buffers(): b.zero_()
    s.cache.table.copy_(torch.arange({batch}, device="cuda")[:, None])
    s.stop_ids.fill_(-1); s.limit.fill_(1000); s.x.copy_(model.embed(torch.arange({batch}, device="cuda") + 7))
    s.cache.lengths.fill_(1)
    s.sampling.temperature.fill_(0.9); s.sampling.top_k.fill_(40); s.sampling.top_p.fill_(0.9)
    engine.decoder.run(96, {kind!r})
    torch.cuda.synchronize()
    return digest()
if {pdl}:
    got = {{run() for _ in range({repeats})}}
else:
    with kernels.pdl_disabled():
        got = {{run() for _ in range(2)}}
print(" ".join(sorted(got)))
"""


@pytest.mark.parametrize(
    ("shape", "batch", "kind", "mode"),
    [
        ("llama-3.2-1b", 1, "greedy", None),
        ("llama-3.2-1b", 5, "draw", None),
        ("llama-3.1-8b", 1, "greedy", None),
        ("llama-3.1-8b", 16, "truncate", None),
        ("llama-3.1-8b", 40, "greedy", None),  # rings of 64 rows beside cuBLAS
        ("llama-3.1-8b", 128, "greedy", None),  # gate_up
        ("qwen3-8b", 1, "truncate", None),
        ("qwen2.5-7b", 3, "truncate", None),
        ("llama-3.1-8b", 16, "greedy", "int4"),  # rings of packed weights
        ("llama-3.1-8b", 64, "draw", "fp8"),
    ],
)
def test_early_launches_keep_the_order(shape, batch, kind, mode):
    """1,000 replays of 8-step graphs, with and without programs that are made late: tokens and cache equal those without PDL,
    bit for bit."""

    def digests(pdl, repeats, delay):
        code = ORDER.format(root=str(ROOT), shape=shape, batch=batch, kind=kind, mode=mode, pdl=pdl, repeats=repeats)
        env = os.environ | {"ROOFLAMA_DELAY_NS": str(delay)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=500)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    expected = digests(False, 2, 0)
    assert len(expected) == 1
    assert digests(True, 84, 0) == expected  # 84 x 12 = 1,008 replays
    assert digests(True, 8, 3000) == expected


@pytest.mark.parametrize(("shape", "mode"), [("llama-3.2-1b", "graph"), ("qwen3-8b", "graph"), ("llama-3.2-1b", "eager")])
def test_neighbours_change_no_bit(shape, mode, tokens):
    """batch_invariant: 16 steps' log-probabilities and the last logits are bitwise those of the prompt alone, with 1, 7, 15
    and 63 neighbours of other lengths (every bucket of graphs), and in a run of 65 through eight rows that are taken again."""
    model = Transformer(dataclasses.replace(SHAPES[shape], num_layers=3), device="cuda")
    fill_randomly(model)
    engine = Engine(model, decode_mode=mode, max_seq_len=1024, batch_invariant=True)
    params = SamplingParams(max_new_tokens=17, ignore_eos=True, logprobs=3)
    prompt = tokens[:100].tolist()

    def run(neighbours):
        # prefilled in one go (runs.CHUNK); else the first is done before the others, and the last logits are not its own
        others = [tokens[: 1 + 53 * i % (60 if neighbours > 15 else 150)].tolist() for i in range(neighbours)]
        assert len(prompt) + sum(len(other) for other in others) <= CHUNK
        (first, *_), _ = engine.generate([prompt, *others], params)
        return first, engine.decoder.logits[0].clone()

    alone, logits = run(0)
    for neighbours in (1, 7, 15, 63):
        together, theirs = run(neighbours)
        assert torch.equal(theirs, logits), neighbours
        assert together == alone, neighbours
    others = [Request(tokens[: 1 + 53 * i % 150].tolist(), SamplingParams(max_new_tokens=5 + i % 20)) for i in range(64)]
    results = engine.generate_many([*others[:20], Request(prompt, params, id="it"), *others[20:]], batch_size=8)
    (output,) = next(outputs for request, outputs in results if request.id == "it")
    results.close()
    assert output == alone


HOLDER = """
import torch
held = []
try:
    while True:
        held.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    del held[-{left}:]
    torch.cuda.empty_cache()
print("held", flush=True)
input()
"""


@pytest.fixture
def crowded():
    """Another process holds all of the GPU's memory but some 256 MiB."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(left=4)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate("\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoint_path", "MODEL"], "the weights need"),
        (["--max_seq_len", "1024", "--batch_size", "2000"], "the KV cache of 2000 x 1024 tokens needs"),
    ],
    ids=["weights", "cache"],
)
def test_29_another_process_holds_the_gpu(crowded, argv, said, tmp_path):
    """One line with needed and free GiB, for weights of 3 GiB and for a cache of 6 GiB."""
    if "MODEL" in argv:
        import checkpoints

        config = dataclasses.replace(SHAPES["llama-3.2-1b"], num_layers=20)
        checkpoints.write_random_hf(tmp_path / "model", config, sparse=True)
    argv = [str(tmp_path / "model") if word == "MODEL" else word for word in argv]
    done = subprocess.run([sys.executable, str(ROOT / "generate.py"), *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "free" in last
    assert "GiB" in last
    assert "Traceback" not in done.stderr
