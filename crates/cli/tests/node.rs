//! `node` with large buffers, in less memory.

mod common;

use common::{Case, program};

const SCRIPT: &str = r#"
const crypto = require('crypto');
const count = 24, size = 4 << 20;
let x = 12345;
const next = () => (x = (Math.imul(x, 1103515245) + 12345) & 0x7fffffff);
const buffers = [];
for (let n = 0; n < count; n++) {
  const buffer = Buffer.alloc(size);
  for (let at = 0; at < size; at += 1024) buffer.writeUInt32LE(next(), at);
  buffers.push(buffer);
}
const objects = [];
for (let n = 0; n < 30000; n++) objects.push({ n, text: 'object ' + n });
for (let n = 0; n < 8000; n++) buffers[next() % count][next() % size] = n & 255;
const hash = crypto.createHash('sha256');
for (const buffer of buffers) hash.update(buffer);
for (const object of objects) hash.update(object.text);
console.log(hash.digest('hex'));
"#;

#[test]
fn buffers_in_a_half_and_a_quarter() {
    let Some(node) = program("node") else { return };
    Case::new("node", &node).args(&["-e", SCRIPT]).squeeze(&[2, 4]);
}
