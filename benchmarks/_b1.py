import sys, time, tempfile
from pathlib import Path
from benchmarks.nodes import echo_node
from benchmarks.items import *
from benchmarks.http_batches import *

n = int(sys.argv[1])
p = Path(tempfile.mkdtemp()) / "in.jsonl"
write_input(p, n)
with echo_node() as node:
    c = BatchClient(node.base_url)
    t = time.time()
    f = c.upload(p)
    print("upload", time.time() - t)
    for _ in range(int(sys.argv[2])):
        s, b = run_to_end(c, f, 600)
        print(s, n / s, {k: v for k, v in b.items() if k.endswith("_at")})
    check_output(c.output_lines(b["output_file_id"]), n)
    (node.folder)
p.unlink()
