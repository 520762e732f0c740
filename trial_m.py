import sys, torch
from dataclasses import replace
from functools import partial
from tokenspeed.bench.gpu.experts import *
from tokenspeed.kernels.cuda import experts_packed as ep
from tokenspeed.kernels.cuda.experts_packed import Way, variant, stream_packed
g=torch.Generator("cuda").manual_seed(7)
case=replace(GPT_OSS, fmt="mxfp4")
layers=[case.random(g) for _ in range(LAYERS)]
few=[Way(6,6,2,4),Way(6,6,3,4),Way(6,3,3,4),Way(6,3,2,4),Way(8,2,2,4),Way(12,6,1,4),Way(12,6,2,2),Way(5,5,4,2),Way(4,4,4,2),Way(12,3,1,4)]
many=[Way(15,3,1,4),Way(12,3,1,4),Way(12,6,1,4),Way(12,2,1,4),Way(16,2,1,4),Way(18,6,1,4),Way(18,3,1,2),Way(6,3,2,4),Way(6,6,2,4)]
A={1:few,2:few[:6]+few[-1:],4:few[:6]+many[:4],8:many,32:many[:5]}
B={1:few[:2],4:many[1:2],8:many[:2],32:many[:1]}
def cs(c, tag, ways):
        given=turns(case,c,layers,g)
        moved=given.distinct*3*case.ff*case.hidden*17/32
        for w in ways:
            f=variant(c,4,2880,2880,case.act,True,w); s=variant(c,4,2880,2880,"none",True,w)
            if f is None or s is None: continue
            yield Case(f"B{c} {tag} {w} stages {f.stages}",moved,1.0,lambda: given.launch(partial(stream_packed,first=f,second=s)))
with torch.inference_mode():
  for tag,extra,W in (("all",{},A),("nocopy",{"NOCOPY":1},B)):
    ep.EXTRA=extra; ep.kernel.cache_clear()
    print_table(x for c in W for x in cs(c,tag,W[c]))
