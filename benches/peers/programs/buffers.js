// Large buffers and small objects: written here and there, then read in order. Arguments: how many buffers, objects and
// writes.
const crypto = require('crypto');
const [count = 48, small = 100000, writes = 20000] = process.argv.slice(2).map(Number);
const size = 4 << 20;
let x = 12345;
const next = () => (x = (Math.imul(x, 1103515245) + 12345) & 0x7fffffff);
const buffers = [];
for (let n = 0; n < count; n++) {
  const buffer = Buffer.alloc(size);
  for (let at = 0; at < size; at += 1024) buffer.writeUInt32LE(next(), at);
  buffers.push(buffer);
}
const objects = [];
for (let n = 0; n < small; n++) objects.push({ n, text: 'object ' + n });
for (let n = 0; n < writes; n++) buffers[next() % count][next() % size] = n & 255;
const hash = crypto.createHash('sha256');
for (const buffer of buffers) hash.update(buffer);
for (const object of objects) hash.update(object.text);
console.log(hash.digest('hex'));
