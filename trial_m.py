import sys, torch
from dataclasses import replace
from functools import partial
from tokenspeed.bench.gpu.experts import *
from tokenspeed.kernels.cuda import experts_packed as ep
from tokenspeed.kernels.cuda.experts_packed import Way, variant, stream_packed
g=torch.Generator("cuda").manual_seed(7)
case=replace(GPT_OSS, fmt="mxfp4")
layers=[case.random(g) for _ in range(LAYERS)]
WAYS={1:[Way(4,4,4),Way(8,2,4)],4:[Way(12,1,4)],8:[Way(16,1,4),Way(12,1,4),Way(20,1,2),Way(24,1,2)],32:[Way(16,1,4)]}
def cs(c, tag):
        given=turns(case,c,layers,g)
        moved=given.distinct*3*case.ff*case.hidden*17/32
        for w in WAYS[c]:
            f=variant(c,4,2880,2880,case.act,True,w); s=variant(c,4,2880,2880,"none",True,w)
            if f is None or s is None: continue
            yield Case(f"B{c} {tag} {w} stages {f.stages}",moved,1.0,lambda: given.launch(partial(stream_packed,first=f,second=s)))
with torch.inference_mode():
  for tag,extra,piece in (("all",{},1),("nocopy",{"NOCOPY":1},1),("plain",{"PLAIN":1},1),("plain nocopy",{"PLAIN":1,"NOCOPY":1},1),("plain nopower nocopy",{"PLAIN":1,"NOCOPY":1,"NOPOWER":1},1),("plain nohmma nocopy",{"PLAIN":1,"NOCOPY":1,"NOHMMA":1},1),("plain nocode nocopy",{"PLAIN":1,"NOCOPY":1,"NOCODE":1},1)):
    ep.EXTRA=extra; ep.PIECE=piece; ep.kernel.cache_clear(); ep.tensor_maps.cache_clear()
    print_table(x for c in (1,4,8,32) for x in cs(c,tag))
