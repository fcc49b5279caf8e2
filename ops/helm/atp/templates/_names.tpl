{{- define "atp.name" -}}
{{- if contains "atp" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-atp{{ end }}
{{- end }}

{{- define "atp.selector" -}}
app.kubernetes.io/name: atp
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "atp.labels" -}}
{{ include "atp.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Where each router is found by its own name, ready or not. */ -}}
{{- define "atp.places" -}}
{{ include "atp.name" . }}-routers
{{- end }}

{{- /* What the configuration says must fit what the chart does. */ -}}
{{- define "atp.check" -}}
{{- $config := fromYaml .Values.config -}}
{{- if hasKey $config "Error" }}{{ fail (printf "config: %s" $config.Error) }}{{ end -}}
{{- range list "router" "listen" "data_dir" }}
{{- if hasKey $config . }}{{ fail (printf "config: %s is written by the chart; leave it out" .) }}{{ end }}
{{- end -}}
{{- $log := dig "log" "kind" "local" $config -}}
{{- $store := dig "store" "kind" "memory" $config -}}
{{- if and (gt (int .Values.replicaCount) 1) (or (ne $log "kafka") (ne $store "redis")) }}
{{- fail (printf "replicaCount: %d routers need log.kind kafka and store.kind redis in config, not %s and %s" (int .Values.replicaCount) $log $store) }}
{{- end -}}
{{- range $name, $_ := .Values.secretEnv }}
{{- if hasKey $.Values.secret $name }}{{ fail (printf "secretEnv: %s stands in `secret` too" $name) }}{{ end }}
{{- end -}}
{{- end }}
