//! Fuzzing without coverage, for a moment: `smoke [--seconds N] [--seed N] [TARGET..]`.
//!
//! What     every target gets its share of the time. Inputs are seeds with random changes; changed inputs go
//!          back into the pool, so that changes add up.
//! Why      it runs on the stable toolchain, and is the same for the same seed: good enough to catch what a
//!          change breaks. To search deep, use cargo-fuzz.
//! Fails    with exit code 1 if a target panicked; the input is kept in `fuzz/artifacts/TARGET/`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use uhmm_fuzz::{TARGETS, Target};

const LONGEST: usize = 512;
const POOL: usize = 256;

struct Options {
    seconds: u64,
    seed: u64,
    targets: Vec<Target>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { seconds: 20, seed: 1, targets: Vec::new() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let text = arguments.next().unwrap_or_default();
            text.parse().map_err(|_| format!("{argument} needs a number, not {text:?}"))
        };
        match argument.as_str() {
            "--seconds" => options.seconds = number()?,
            "--seed" => options.seed = number()?,
            name => match TARGETS.iter().find(|target| target.name == name) {
                Some(target) => options.targets.push(*target),
                None => {
                    return Err(format!(
                        "there is no target {name:?}: {}",
                        TARGETS.map(|t| t.name).join(", ")
                    ));
                }
            },
        }
    }
    if options.targets.is_empty() {
        options.targets = TARGETS.to_vec();
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let share = Duration::from_secs(options.seconds) / options.targets.len() as u32;
    let mut failed = 0;
    for target in &options.targets {
        match fuzz(*target, share, options.seed) {
            Ok(runs) => println!("{:<12} {runs:>9} inputs", target.name),
            Err(input) => {
                failed += 1;
                keep(target.name, &input);
            }
        }
    }
    println!("seed {}: {failed} of {} targets failed", options.seed, options.targets.len());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs `target` for `time`. `Err` with the first input that made it panic.
fn fuzz(target: Target, time: Duration, seed: u64) -> Result<u64, Vec<u8>> {
    let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
    let mut pool = (target.seeds)();
    for seed in &pool {
        attempt(target, seed)?;
    }
    let start = Instant::now();
    let mut runs = pool.len() as u64;
    while start.elapsed() < time {
        for _ in 0..16 {
            let other = pool[random.below(pool.len())].clone();
            let mut input = pool[random.below(pool.len())].clone();
            for _ in 0..1 + random.below(6) {
                change(&mut input, &other, &mut random);
            }
            attempt(target, &input)?;
            runs += 1;
            if random.below(8) == 0 {
                // A seed in eight is kept as it was, so that the pool does not drift into noise.
                if pool.len() < POOL {
                    pool.push(input);
                } else {
                    let place = POOL / 8 + random.below(POOL - POOL / 8);
                    pool[place] = input;
                }
            }
        }
    }
    Ok(runs)
}

fn attempt(target: Target, input: &[u8]) -> Result<(), Vec<u8>> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).map_err(|_| input.to_vec())
}

/// One random change.
fn change(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    const BYTES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b' ', b'-', b'%', b':', b'?', b'0', b'9'];
    let at = random.below(input.len() + 1);
    let here = (at < input.len()).then_some(at);
    match (random.below(8), here) {
        (0, Some(at)) => input[at] ^= 1 << random.below(8),
        (1, Some(at)) => input[at] = random.next() as u8,
        (2, Some(at)) => input[at] = BYTES[random.below(BYTES.len())],
        (3, Some(at)) => drop(input.remove(at)),
        (4, _) => input.insert(at, BYTES[random.below(BYTES.len())]),
        (5, _) => input.insert(at, random.next() as u8),
        (6, _) => {
            // The front of one and the back of another.
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        (_, Some(at)) => {
            // A piece twice.
            let end = (at + 1 + random.below(16)).min(input.len());
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        _ => input.push(random.next() as u8),
    }
    input.truncate(LONGEST);
}

fn keep(target: &str, input: &[u8]) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts").join(target);
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let path = directory.join(format!("smoke-{hash:016x}"));
    match std::fs::create_dir_all(&directory).and_then(|()| std::fs::write(&path, input)) {
        Ok(()) => eprintln!(
            "{target} panicked; again: cargo run --release --manifest-path fuzz/Cargo.toml --bin {target} -- {}",
            path.display()
        ),
        Err(error) => eprintln!("{target} panicked on {input:02x?}, which cannot be kept: {error}"),
    }
}

/// xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}
