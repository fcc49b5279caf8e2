#!/usr/bin/env bash
# A real Kafka on loopback for the tests: one node, or three brokers and a controller of their own.
# It owns one folder of the user's cache; the data of its topics is thrown away when it stops.
#
#   tests/parts/kafka.sh start [--brokers 1|3] [--set NAME] [--owner PID]   sets it up (first time: downloads), starts it, prints NAME=value lines
#   tests/parts/kafka.sh url [--brokers 1|3] [--set NAME]                   prints the same lines if it runs, else exits 1
#   tests/parts/kafka.sh stop [--brokers 1|3] [--set NAME] [--owner PID]    stops it; with an owner: only if no other owner is left
#   tests/parts/kafka.sh kill N | revive N [--set NAME]                     SIGKILL for broker N (1 to 3) of the three; its start with its data
#
# Who kills brokers gives its set a name, so that nobody else is on it.
# With `--owner` it ends by itself soon after the last owner's process has ended. Without, it runs until `stop`.
# Needs: bash, Java 17 or newer, Maven, flock and setsid (util-linux). Messages go to stderr; stdout carries only
# ATP_KAFKA (host:port, or three with commas) and ATP_KAFKA_DIR, where each node's server.log is.
set -euo pipefail

READY_SECONDS=90
LOCK_SECONDS=300
HEAP=256m

say() { printf 'kafka: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '5,8s/^#   //p' "$0" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=${1:-}
[ $# -gt 0 ] && shift
owner= brokers=1 node= name=
case $command in
    kill|revive)
        case ${1:-} in [123]) node=$1; brokers=3; shift ;; *) say "$command takes a broker, 1 to 3"; usage ;; esac ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --owner)
            owner=${2:-}
            case $owner in ''|*[!0-9]*) say "--owner takes the id of a running process, not '$owner'"; exit 2 ;; esac
            shift 2 ;;
        --brokers)
            brokers=${2:-}
            case $brokers in 1|3) ;; *) say "--brokers takes 1 or 3, not '$brokers'"; exit 2 ;; esac
            shift 2 ;;
        --set)
            name=${2:-}
            case $name in ''|*[!A-Za-z0-9-]*) say "--set takes a name of A-Za-z0-9-, not '$name'"; exit 2 ;; esac
            shift 2 ;;
        *) say "unknown argument '$1'"; usage ;;
    esac
done

if [ -n "${XDG_CACHE_HOME:-}" ]; then base=$XDG_CACHE_HOME
elif [ -n "${HOME:-}" ]; then base=$HOME/.cache
else die "neither XDG_CACHE_HOME nor HOME is set; set one to say where Kafka's jars may be kept"; fi
dir=$base/atp/kafka
jars=$dir/jars-$(cksum <"$here/kafka-pom.xml" | cut -d' ' -f1)
set=$dir/brokers-$brokers${name:+-$name}
owners=$set/owners         # one empty file per owner's process id; `keep` for a start without owner
state=$set/url             # the lines that `start` prints, written once all nodes serve

# One short-lived JVM's worth of start-up matters more here than what a hot server can do.
JAVA=(java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Djava.net.preferIPv4Stack=true
    -Dlog4j.shutdownHookEnabled=false)

lock() {
    mkdir -p "$dir" || die "cannot make $dir; set XDG_CACHE_HOME to a folder that can be written"
    exec 9>"$dir/lock"
    flock -w "$LOCK_SECONDS" 9 || die "another start has held $dir/lock for $LOCK_SECONDS s"
}

# Process ids are reused; only one that runs on our file is ours to signal. A zombie has no arguments.
ours() { [ -n "$1" ] && case $(tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null) in *"$2"*) return 0 ;; *) return 1 ;; esac; }
node_pid() { cat "$set/$1/pid" 2>/dev/null || true; }
runs() { ours "$(node_pid "$1")" "$set/$1/server.properties"; }
nodes() { (cd "$set" 2>/dev/null && ls -d node-* 2>/dev/null) || true; }
serves() { [ -s "$state" ] && for n in $(nodes); do runs "$n" || return 1; done; }

set_up() {
    [ -e "$jars/ready" ] && return
    command -v java >/dev/null && command -v mvn >/dev/null \
        || die "java and mvn are missing; install Java 17 and Maven (Debian, Ubuntu: apt install openjdk-17-jre-headless maven)"
    say "downloading Kafka (about 45 MB) from Maven Central into $jars"
    rm -rf "$jars"
    mkdir -p "$jars"
    local copy=org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies try
    for try in 1 2 3; do
        mvn -f "$here/kafka-pom.xml" -B -ntp -q -Dmaven.repo.local="$jars/repository" "$copy" \
            -DincludeScope=runtime -DoutputDirectory="$jars/lib" >"$jars/mvn.log" 2>&1 </dev/null && break
        [ "$try" != 3 ] || { tail -n 5 "$jars/mvn.log" >&2; die "Maven cannot copy Kafka's jars; check the network"; }
        sleep "$try"
    done
    rm -rf "$jars/repository"
    cat >"$jars/log4j2.properties" <<'P'
status=error
appender.file.type=File
appender.file.name=file
appender.file.fileName=${sys:node.log}
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{ISO8601} %p %c{1}: %m%n
rootLogger.level=info
rootLogger.appenderRef.file.ref=file
P
    # What `format` writes for one node serves all: a node that starts fills in the rest of its own.
    cat >"$jars/format.properties" <<P
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:1,CONTROLLER://127.0.0.1:2
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:2
log.dirs=$jars/format
P
    "${JAVA[@]}" -Dnode.log="$jars/format.log" -Dlog4j2.configurationFile="$jars/log4j2.properties" -cp "$jars/lib/*" \
        kafka.tools.StorageTool format -t "$(cluster_id)" -c "$jars/format.properties" >"$jars/format.out" 2>&1 \
        || { tail -n 5 "$jars/format.out" >&2; die "Kafka's storage tool failed"; }
    touch "$jars/ready"
}

# 16 bytes in base64 for URLs; Kafka refuses one that begins with a dash.
cluster_id() { printf 'A%sA' "$(head -c 30 /dev/urandom | base64 -w0 | tr -d '+/=' | cut -c1-20)"; }

# Below the range from which the system takes ports for outgoing connections.
taken=" "
free_port() {
    while :; do
        port=$((10240 + (RANDOM * 32768 + RANDOM) % 22000))
        case $taken in *" $port "*) continue ;; esac
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then taken="$taken$port "; return; fi
    done
}

# make_node ID ROLES LISTENERS
make_node() {
    local home=$set/node-$1 copies=$brokers in_sync=1
    [ "$brokers" = 3 ] && in_sync=2
    mkdir -p "$home/data"
    cat >"$home/server.properties" <<P
node.id=$1
process.roles=$2
listeners=$3
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.voters=$voters
log.dirs=$home/data
auto.create.topics.enable=false
default.replication.factor=$copies
min.insync.replicas=$in_sync
offsets.topic.num.partitions=1
offsets.topic.replication.factor=$copies
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=$copies
transaction.state.log.min.isr=$in_sync
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=$copies
share.coordinator.state.topic.min.isr=$in_sync
# A killed broker is missed after this long; until then appends wait for it.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=250
# The default takes 128 MiB and a second of each start.
log.cleaner.dedupe.buffer.size=2097152
num.network.threads=2
num.io.threads=4
P
    cp "$jars/format/bootstrap.checkpoint" "$home/data/"
    printf 'version=1\ncluster.id=%s\nnode.id=%s\n' "$cluster" "$1" >"$home/data/meta.properties"
}

launch_node() {
    local home=$set/$1
    : >"$home/server.log"
    # Without `9>&-` the node would hold this start's lock for ever.
    setsid "${JAVA[@]}" -Xmx$HEAP -XX:+ExitOnOutOfMemoryError -Dnode.log="$home/server.log" \
        -Dlog4j2.configurationFile="$jars/log4j2.properties" -cp "$jars/lib/*" kafka.Kafka "$home/server.properties" \
        </dev/null >>"$home/out.log" 2>&1 9>&- &
    echo $! >"$home/pid"
    disown
}

# 75: a port was taken meanwhile.
wait_for() {
    local n ends=$((SECONDS + READY_SECONDS))
    for n in "$@"; do
        until grep -q 'Kafka Server started' "$set/$n/server.log"; do
            if ! runs "$n" && sleep 0.2 && ! runs "$n"; then
                grep -qs 'Address already in use' "$set/$n/server.log" "$set/$n/out.log" && return 75
                tail -n 5 "$set/$n/out.log" "$set/$n/server.log" >&2
                die "$n ended at its start"
            fi
            [ $SECONDS -lt $ends ] || die "$n did not start within $READY_SECONDS s; its log: $set/$n/server.log"
            sleep 0.05
        done
    done
}

launch() {
    set_up
    local try status i control urls
    for try in 1 2 3; do
        end_all
        mkdir -p "$owners"
        cluster=$(cluster_id) urls=
        free_port; control=$port
        if [ "$brokers" = 1 ]; then
            voters=1@127.0.0.1:$control
            free_port
            make_node 1 broker,controller "PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$control"
            urls=127.0.0.1:$port
        else
            voters=100@127.0.0.1:$control
            make_node 100 controller "CONTROLLER://127.0.0.1:$control"
            for i in 1 2 3; do
                free_port
                make_node "$i" broker "PLAINTEXT://127.0.0.1:$port"
                urls=${urls:+$urls,}127.0.0.1:$port
            done
        fi
        for i in $(nodes); do launch_node "$i"; done
        status=0
        # shellcheck disable=SC2046 # names of nodes have no spaces
        wait_for $(nodes) || status=$?
        [ $status = 75 ] || break
        say "a port was taken meanwhile; trying others"
    done
    [ $status = 0 ] || die "no free ports"
    printf 'ATP_KAFKA=%s\nATP_KAFKA_DIR=%s\n' "$urls" "$set" >"$state.part"
    mv "$state.part" "$state"
    setsid "$0" watch --brokers "$brokers" ${name:+--set "$name"} </dev/null >/dev/null 2>&1 9>&- &
    disown
}

# SIGKILL: what they hold is thrown away.
end_all() {
    local n pid
    for n in $(nodes); do
        pid=$(node_pid "$n")
        while ours "$pid" "$set/$n/server.properties"; do kill -9 "$pid" 2>/dev/null || true; sleep 0.05; done
    done
    rm -rf "$set"
}

wanted() {
    local file name
    for file in "$owners"/*; do
        name=${file##*/}
        [ "$name" = keep ] && return 0
        [ -e "/proc/$name" ] && [ "$(sed 's/.*) \(.\).*/\1/' "/proc/$name/stat" 2>/dev/null)" != Z ] && return 0
        rm -f "$file"
    done
    return 1
}

# Ends the set once no owner is left. The look is taken under the lock, so no start can come between it and the end.
watch() {
    while sleep 1; do
        [ -e "$state" ] || exit 0
        exec 9>"$dir/lock"
        if flock -n 9; then
            [ -e "$state" ] || exit 0
            wanted || { end_all; exit 0; }
        fi
        exec 9>&-
    done
}

start() {
    [ -z "$owner" ] || [ -e "/proc/$owner" ] || die "--owner $owner: no such process"
    lock
    # A set whose broker was killed by a test and not revived is begun anew.
    serves || launch
    touch "$owners/${owner:-keep}"
    cat "$state"
}

stop() {
    [ -d "$set" ] || return 0
    lock
    if [ -n "$owner" ]; then
        rm -f "$owners/$owner"
        wanted && return 0
    fi
    end_all
}

case $command in
    start) start ;;
    stop) stop ;;
    url) serves || die "not running; '$0 start' starts it"; cat "$state" ;;
    kill) runs "node-$node" || die "broker $node doesn't run"; kill -9 "$(node_pid "node-$node")" ;;
    revive) lock; runs "node-$node" || { launch_node "node-$node"; wait_for "node-$node"; } ;;
    watch) watch ;;
    *) usage ;;
esac
