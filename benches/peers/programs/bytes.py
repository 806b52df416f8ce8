# One array of 192 MiB: filled in order, written here and there, read in order.
import hashlib
import random

random.seed(11)
size = 192 << 20
array = bytearray(size)
for at in range(0, size, 4096):
    array[at:at + 8] = (at * 2654435761 & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
for n in range(50_000):
    array[random.randrange(size)] = n & 255
print(hashlib.sha256(array).hexdigest())
