# A dictionary of a million keys: random reads, and a write for every fourth key.
import random

random.seed(1)
table = {n: str(n) * 3 for n in range(1_000_000)}
total = 0
for _ in range(250_000):
    key = random.randrange(1_000_000)
    total += len(table[key])
    if key % 4 == 0:
        table[key] = str(key + 1)
print(total, len(table))
