//! Builds the agent's library, so that the command carries it.
//!
//! A build of its own, in a directory of its own: always optimised, whatever the profile of the command, and
//! without the flags that this build was given (sanitizers, `--cfg loom`, a linter in the compiler's place).

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the agent is made of.
const PARTS: [&str; 6] = ["addr", "agent", "core", "devices", "sys", "uhmm"];
/// What the outer build says that must not reach the inner one.
const OURS: [&str; 10] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "CARGO_TARGET_DIR",
    "MAKEFLAGS",
    "MFLAGS",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CLIPPY_ARGS",
];

fn main() {
    let var = |name: &str| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}")));
    let crates = var("CARGO_MANIFEST_DIR").parent().map(Path::to_path_buf).expect("crates/cli has a parent");
    println!("cargo::rerun-if-changed=build.rs");
    for part in PARTS {
        for what in ["src", "Cargo.toml"] {
            println!("cargo::rerun-if-changed={}", crates.join(part).join(what).display());
        }
    }
    println!("cargo::rerun-if-changed={}", crates.join("../Cargo.toml").display());

    let (out, target, host) = (var("OUT_DIR"), env::var("TARGET"), env::var("HOST"));
    let built = out.join("agent");
    let mut cargo = Command::new(var("CARGO"));
    cargo.arg("build").arg("--release").arg("--package").arg("uhmm-agent");
    cargo.arg("--manifest-path").arg(crates.join("agent/Cargo.toml")).arg("--target-dir").arg(&built);
    let mut library = built;
    if let (Ok(target), Ok(host)) = (target, host)
        && target != host
    {
        cargo.arg("--target").arg(&target);
        library.push(target);
    }
    for name in OURS {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo, which runs this, can be run");
    assert!(status.success(), "the agent (crates/agent) does not build: {status}");
    library.push("release/libuhmm_agent.so");
    println!("cargo::rustc-env=UHMM_AGENT={}", library.display());
}
