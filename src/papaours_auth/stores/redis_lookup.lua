-- A key, its machine, and the epochs of both partitions: one snapshot, and nothing written.
-- KEYS: digests, keys and changes of the key's partition.
-- ARGV: what the names of all partitions begin with ("" on Cluster, where the machine is asked for apart), the digests.
-- Gives nothing where the log is lost, else lines in one string, which parses faster than an array:
-- tip [, place of the digest, key, machine's partition, machine's id [, machine's tip, machine]]
local tip = redis.call('LINDEX', KEYS[3], -1)
if not tip then return false end
tip = string.match(tip, '^%d+ %x+')
for place = 2, #ARGV do
  local owner = redis.call('HGET', KEYS[1], ARGV[place])
  if owner then
    local partition, machine_id, key_id = string.match(owner, '^(%d+)\n([^\n]*)\n([^\n]*)')
    local key = redis.call('HGET', KEYS[2], key_id) or ''
    local answer = tip .. '\n' .. (place - 2) .. '\n' .. key .. '\n' .. partition .. '\n' .. machine_id
    if ARGV[1] == '' then return answer end
    local there = ARGV[1] .. partition .. '}:'
    local machines_tip = redis.call('LINDEX', there .. 'changes', -1)
    machines_tip = machines_tip and string.match(machines_tip, '^%d+ %x+') or ''
    return answer .. '\n' .. machines_tip .. '\n' .. (redis.call('HGET', there .. 'machines', machine_id) or '')
  end
end
return tip
