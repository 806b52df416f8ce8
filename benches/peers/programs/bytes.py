# One array: filled in order, written here and there, read in order. Arguments: how many MiB, and writes.
import hashlib
import random
import sys

random.seed(11)
mebibytes, writes = map(int, sys.argv[1:] or (192, 50_000))
size = mebibytes << 20
array = bytearray(size)
for at in range(0, size, 4096):
    array[at:at + 8] = (at * 2654435761 & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
for n in range(writes):
    array[random.randrange(size)] = n & 255
print(hashlib.sha256(array).hexdigest())
