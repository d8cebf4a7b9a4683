//! KV blocks on their way: to the host and back, to another process, over a link.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod reference;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::Arc;

use baton_cuda::{Error, KvMemory, PeerMemory, Shape};
use reference::{Random, device};

fn shape() -> Shape {
    Shape {
        layers: 3,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 64,
        vocab: 64,
        rope_theta: 10_000.0,
        interleaved: false,
        rms_eps: 1e-5,
        block_size: 16,
    }
}

fn memory(blocks: usize) -> Arc<KvMemory> {
    KvMemory::new(&device(), &shape(), blocks).unwrap()
}

/// What a block of this number holds.
fn contents(block: u32, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(u64::from(block) + 77);
    (0..bytes).map(|_| random.bits() as u8).collect()
}

fn fill(kv: &KvMemory) {
    for block in 0..kv.blocks() as u32 {
        kv.write(block, &contents(block, kv.block_bytes())).unwrap();
    }
}

#[track_caller]
fn assert_holds(kv: &KvMemory, block: u32, contents_of: u32) {
    let mut bytes = vec![0; kv.block_bytes()];
    kv.read(block, &mut bytes).unwrap();
    assert!(bytes == contents(contents_of, kv.block_bytes()), "block {block}");
}

#[test]
fn blocks_come_back_as_they_went() {
    let kv = memory(5);
    assert_eq!(kv.block_bytes(), 3 * 2 * 2 * 16 * 32 * 2);
    fill(&kv);
    (0..5).for_each(|block| assert_holds(&kv, block, block));
    assert!(matches!(kv.read(5, &mut vec![0; kv.block_bytes()]), Err(Error::Mismatch(_))));
    assert!(matches!(kv.write(0, &[0; 10]), Err(Error::Mismatch(_))));
}

#[test]
fn blocks_go_from_one_memory_to_another() {
    let (kv, staging) = (memory(9), memory(4));
    fill(&staging);
    kv.copy_from(&staging, &[2, 3, 0], &[7, 8, 1]).unwrap();
    [(7, 2), (8, 3), (1, 0)].into_iter().for_each(|(to, from)| assert_holds(&kv, to, from));
    assert!(matches!(kv.copy_from(&staging, &[4], &[0]), Err(Error::Mismatch(_))));
    assert!(matches!(kv.copy_from(&staging, &[0], &[9]), Err(Error::Mismatch(_))));
    assert!(baton_cuda::visible(&kv.device().uuid()));
    assert!(!baton_cuda::visible(&[9; 16]));
}

#[test]
fn every_call_can_be_a_threads_first() {
    let (kv, other) = (memory(2), memory(2));
    fill(&kv);
    fill(&other);
    // What the calls take turns at was made in this thread.
    let new = |call: &(dyn Fn() -> Result<(), Error> + Sync)| {
        std::thread::scope(|scope| scope.spawn(call).join().unwrap()).unwrap();
    };
    new(&|| kv.read(0, &mut vec![0; kv.block_bytes()]));
    new(&|| kv.write(1, &contents(1, kv.block_bytes())));
    new(&|| kv.copy_from(&other, &[1], &[0]));
    new(&|| kv.export().map(|_| ()));
    new(&|| kv.device().memory().map(|_| ()));
    assert_holds(&kv, 0, 1);
}

#[test]
fn several_threads_copy_at_once() {
    let kv = memory(16);
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let kv = &kv;
            scope.spawn(move || {
                for block in (0..16).filter(|block| block % 4 == thread) {
                    kv.write(block, &contents(block, kv.block_bytes())).unwrap();
                    assert_holds(kv, block, block);
                }
            });
        }
    });
    (0..16).for_each(|block| assert_holds(&kv, block, block));
}

/// The other process of the test below, which starts it: tells where its blocks are, and lives until
/// its input ends.
#[test]
#[ignore = "run by another test"]
fn other_process() {
    let kv = memory(8);
    fill(&kv);
    let handle: String = kv.export().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\nhandle {handle}");
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn another_process_reads_blocks_where_they_are() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "other_process", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let handle = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("handle ").map(str::to_owned))
        .unwrap();
    let byte = |i: usize| u8::from_str_radix(&handle[2 * i..2 * i + 2], 16).unwrap();
    let handle: [u8; 64] = std::array::from_fn(byte);

    let kv = memory(6);
    let bytes = kv.block_bytes();
    let peer = PeerMemory::open(kv.device(), &handle, 8, bytes).unwrap();
    kv.copy_in(&peer, &[1, 2, 3, 7, 0], &[0, 1, 2, 5, 4]).unwrap();
    for (from, to) in [(1, 0), (2, 1), (3, 2), (7, 5), (0, 4)] {
        assert_holds(&kv, to, from);
    }
    assert!(matches!(kv.copy_in(&peer, &[8], &[0]), Err(Error::Mismatch(_))));
    assert!(matches!(kv.copy_in(&peer, &[0], &[6]), Err(Error::Mismatch(_))));
    assert!(matches!(kv.copy_in(&peer, &[0, 1], &[0]), Err(Error::Mismatch(_))));
    drop(peer);
    // A peer that says it has more than it gave.
    assert!(PeerMemory::open(kv.device(), &handle, 1 << 30, bytes).is_err());

    // A copy that the peer's end meets half-way is one of memory that is still there.
    let peer = PeerMemory::open(kv.device(), &handle, 8, bytes).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    kv.copy_in(&peer, &[5], &[3]).unwrap();
    assert_holds(&kv, 3, 5);
}

#[test]
fn a_process_does_not_open_its_own() {
    let kv = memory(2);
    let handle = kv.export().unwrap();
    assert!(PeerMemory::open(kv.device(), &handle, 2, kv.block_bytes()).is_err());
}

#[cfg(feature = "nccl")]
mod link {
    use std::time::{Duration, Instant};

    use baton_cuda::Device;
    use baton_cuda::nccl::{Link, present, unique_id};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Two ends, on two GPUs; on one where that is the double, which unlike NCCL allows it.
    fn ends() -> Option<[(Arc<KvMemory>, Link); 2]> {
        let first = device();
        let second = match Device::open(1) {
            Ok(second) => second,
            Err(_) if first.name().contains("double") => first.clone(),
            Err(_) => return None,
        };
        if !present() {
            return None;
        }
        let id = unique_id().unwrap();
        let end = |rank: usize, device: Arc<Device>| {
            let link = Link::connect(&device, rank, &id, soon()).unwrap();
            (KvMemory::new(&device, &shape(), 200).unwrap(), link)
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| end(1, second));
            Some([end(0, first), other.join().unwrap()])
        })
    }

    #[test]
    fn blocks_arrive_over_a_link_in_both_directions() {
        let Some([(a, to_b), (b, to_a)]) = ends() else {
            return eprintln!("NCCL and two GPUs are needed");
        };
        fill(&a);
        let from: Vec<u32> = (0..150).rev().collect();
        let to: Vec<u32> = (0..150).map(|i| i + 50).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| to_b.send(&a, &from, soon()).unwrap());
            to_a.receive(&b, &to, soon()).unwrap();
        });
        from.iter().zip(&to).for_each(|(from, to)| assert_holds(&b, *to, *from));
        std::thread::scope(|scope| {
            scope.spawn(|| to_a.send(&b, &[60], soon()).unwrap());
            to_b.receive(&a, &[3], soon()).unwrap();
        });
        assert_holds(&a, 3, from[10]);
        assert!(matches!(to_b.send(&a, &[200], soon()), Err(Error::Mismatch(_))));
    }

    #[test]
    fn nobody_waits_for_ever() {
        let Some([(a, to_b), (b, to_a)]) = ends() else {
            return eprintln!("NCCL and two GPUs are needed");
        };
        // A peer that sends nothing.
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(100);
        assert!(matches!(to_a.receive(&b, &[0], deadline), Err(Error::Nccl { .. })));
        assert!(begun.elapsed() < Duration::from_secs(5));
        // A link that failed stays so, at both ends.
        assert!(to_a.receive(&b, &[0], soon()).is_err());
        drop(to_a);
        assert!(to_b.receive(&a, &[0], soon()).is_err());
    }

    #[test]
    fn an_abort_ends_a_call_in_progress() {
        let Some([(a, to_b), (_, to_a)]) = ends() else {
            return eprintln!("NCCL and two GPUs are needed");
        };
        std::thread::scope(|scope| {
            let call = scope.spawn(|| to_b.receive(&a, &[0], soon()));
            std::thread::sleep(Duration::from_millis(50));
            to_b.abort();
            assert!(call.join().unwrap().is_err());
        });
        drop(to_a);
    }

    #[test]
    fn a_peer_that_never_comes_is_given_up() {
        if !present() {
            return eprintln!("NCCL is needed");
        }
        let id = unique_id().unwrap();
        let deadline = Instant::now() + Duration::from_millis(200);
        assert!(matches!(Link::connect(&device(), 0, &id, deadline), Err(Error::Nccl { .. })));
    }
}
