-- A key, its machine, and the epochs of both partitions: one snapshot, and nothing written.
-- KEYS: digests, keys and changes of the key's partition.
-- ARGV: what the names of all partitions begin with ("" on Cluster, where the machine is asked for apart), the digests.
-- Gives nothing where the log is lost, else {tip, owner, key, machine's tip, machine} as far as it got.
local tip = redis.call('LINDEX', KEYS[3], -1)
if not tip then return false end
tip = string.match(tip, '^%d+ %x+')
for place = 2, #ARGV do
  local owner = redis.call('HGET', KEYS[1], ARGV[place])
  if owner then
    -- [key id, machine's partition, machine id, pepper, algorithm]
    local of = cjson.decode(owner)
    local answer = {tip, place - 2, redis.call('HGET', KEYS[2], of[1]), owner}
    if ARGV[1] ~= '' then
      local there = ARGV[1] .. of[2] .. '}:'
      local machines_tip = redis.call('LINDEX', there .. 'changes', -1)
      answer[5] = machines_tip and string.match(machines_tip, '^%d+ %x+')
      answer[6] = redis.call('HGET', there .. 'machines', of[3])
    end
    return answer
  end
end
return {tip}
