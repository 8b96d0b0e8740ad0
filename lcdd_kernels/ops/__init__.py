"""The only place for `torch.library`: schema, fake, backward (itself an op), backend chosen per call.

The pattern, for an op `f` of stem X that `registry.OPS` names (see `ops/gates.py` for it in full):

    @torch.library.custom_op("lcdd::f", mutates_args=())               # one coarse op per call: 15-30 us each
    def f(x: Tensor, kind: str) -> Tensor:                             # schema types only; no defaults, no checks here
        return choose("f", x)(x, kind=kind)                            # f_ref, f_triton, f_native: same parameters

    @f.register_fake
    def _(x: Tensor, kind: str) -> Tensor: ...                         # shapes and dtypes only

    f.register_autograd(backward, setup_context=setup)                 # backward calls lcdd::f_backward, an op like f

Results are new tensors (an op may not return an input or a view of one); in-place ops name what they write in
`mutates_args` and return None. The public functions validate, then call the op. Importing this package registers every
op.
"""

from lcdd_kernels.ops import channel_match, gated_block, gated_linear, gates, linear_loss, packed_grad

__all__ = ["channel_match", "gated_block", "gated_linear", "gates", "linear_loss", "packed_grad"]
