import torch
import modelpatch as mp
from conftest import draft_patch
def test_smoke(tiny, colors):
    for m in (mp.methods.LinearProbe(), mp.methods.ScaleBias(), mp.methods.ScaleBias(layers="channel"), mp.methods.Subset(), mp.methods.FullFinetune(statistics="learned")):
        p = mp.fit(tiny, colors, m, epochs=3)
        print(m.name, p.metrics, tiny.chain)
        from modelpatch.patch.file import encode_patch, decode_patch
        q = decode_patch(encode_patch(p))
        x = torch.randn(4,3,16,16)
        assert torch.equal(tiny.patched(p)(x), tiny.patched(q)(x))
        assert torch.equal(mp.BoundPatch(tiny,q)(x), tiny.patched(q)(x))
