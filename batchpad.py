# concurrency of save()
import sys, threading, json
sys.path.insert(0,'/work/main')
from benchmarks.students import save
from pathlib import Path
p=Path('/tmp/review14/x.json'); errs=[]
def go(n):
    for i in range(300):
        try: save({'a':[n]*20000},p)
        except Exception as e: errs.append(type(e).__name__)
        try: json.loads(p.read_text())
        except Exception as e: errs.append('READ '+type(e).__name__)
ts=[threading.Thread(target=go,args=(n,)) for n in (1,2)]
[t.start() for t in ts];[t.join() for t in ts]
from collections import Counter; print(Counter(errs))
