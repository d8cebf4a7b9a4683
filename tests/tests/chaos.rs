//! Each kind of fault once in a running cluster under load. `examples/chaos.rs` injects each many
//! times.

use baton_tests::chaos::fault::Fault;
use baton_tests::chaos::{self, Row};

async fn held(fault: Fault) -> Row {
    let row = chaos::run(fault, 1, 7, |line| println!("{line}")).await;
    assert!(row.sent > 5, "there was traffic: {row:?}");
    assert!(row.held(fault), "{row:#?}");
    row
}

#[tokio::test]
async fn a_worker_dies_and_another_stops() {
    for fault in [Fault::KillPrefill, Fault::KillDecode, Fault::StopPrefill, Fault::StopDecode] {
        held(fault).await;
    }
}

#[tokio::test]
async fn the_leading_coordinator_dies_and_stops() {
    for fault in [Fault::KillLeader, Fault::StopLeader] {
        held(fault).await;
    }
}

#[tokio::test]
async fn a_gateway_dies_and_takes_only_its_own_requests_along() {
    for fault in [Fault::KillGateway, Fault::StopGateway] {
        held(fault).await;
    }
}

#[tokio::test]
async fn etcd_goes_away_whole_and_in_part() {
    for fault in [Fault::KillEtcd, Fault::StopEtcd, Fault::KillEtcdLeader, Fault::StopEtcdLeader] {
        held(fault).await;
    }
}

#[tokio::test]
async fn the_network_between_hosts_is_cut_and_slow() {
    for fault in [Fault::CutNetwork, Fault::SlowNetwork] {
        held(fault).await;
    }
}

#[tokio::test]
async fn a_full_disk_costs_stored_responses_and_nothing_else() {
    held(Fault::FullDisk).await;
}

#[tokio::test]
async fn clocks_may_jump() {
    held(Fault::ClockJump).await;
}

#[tokio::test]
async fn pools_change_size_under_load() {
    let row = held(Fault::Scale).await;
    assert_eq!(row.right, row.sent);
}
