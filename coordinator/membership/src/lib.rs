//! Registration under an etcd lease, and a watched view of the cluster.
